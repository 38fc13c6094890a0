"""The parameter server: servers hold the weights, workers compute gradients, policies say who waits for whom.

What is agreed
    plan.py          options, and which go together (pure)
    protocol.py      what is said, by whom, in which bytes
    hello.py         what ranks say of themselves when they meet (pure); meeting.py: they do
    shards.py        which server holds which slice (pure)

A server
    serve.py         its process, from the meeting to the end
    server.py        its loop: hears, asks the policy, answers
    consistency.py   when a push is applied and a worker answered (pure)
    rules.py         how a push changes the weights (pure); weights.py: the slice that it changes
    attendance.py    which workers take part (pure)
    options.py       with which options of its optimizer a worker pushes (pure)
    cut.py           a copy of all servers after the same pushes (pure)
    ledger.py        what is counted (pure); state.py: an optimizer's state in pieces (pure)
    link.py          where pushes land and how answers go out; replica.py: the same, with a backup
    recruiter.py     starts a worker where one died

A worker
    exchange.py      when it pushes and pulls
    client.py        requests to all servers; asking.py: sent again, to a backup
    report.py        what it did since the last push
    edits.py         weights that somebody changed by hand (pure)

Between them
    channel.py       headers and vectors from here to there; opening.py: how one is opened
    wire.py          short messages, with a codec
    doorbell.py      how a waiting process sleeps; seating.py: on which core a worker computes
    memory.py        what processes of one host share
"""
