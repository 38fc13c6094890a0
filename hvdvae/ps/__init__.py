"""The parameter server: servers hold the weights, workers compute gradients, policies say who waits for whom.

protocol.py      what is said, by whom, in which bytes
consistency.py   when a push is applied and a worker answered (pure)
rules.py         how a push changes the weights (pure)
shards.py        which server holds which slice
channel.py       how vectors and headers get to the other side; doorbell.py: how a waiting process sleeps;
                     memory.py: what processes of one host share
ledger.py        what the server counts
server.py        the loop of a server; client.py: a worker's side of it
"""
