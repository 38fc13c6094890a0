"""A study: which way of parallelizing reaches a likelihood first, under which conditions; compare.py runs it.

One idea, one file:

    idea                                                       file
    what is asked: a YAML file with every mistake by its line  located.py, study_file.py
    what is run: one cell a contender, size, scenario, seed    cells.py
    one cell after the other, each an mpirun of its own        run.py, launch.py, namespaces.py
    inside a cell, on every rank: the loop that all share      job.py, loop.py, stopwatch.py
    who takes part                                             contender.py, contender_{ours,horovod,ddp}.py
    after it: likelihood of what the model was, over time      judge.py
    from what ranks and judge wrote to the numbers of a cell   numbers.py
    from cells to what may be said of them                     findings.py
    for people: page, pictures, table                          page.py, page.html.jinja, pictures.py, table.py
"""
