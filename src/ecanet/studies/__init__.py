"""Studies of networks: what they cost, what they bring, what they do.

Read downward: `gates` (what trained gates do), `ablate` (variants x seeds), `bench` (time and memory), `paper` (the
paper's tables beside what is measured), `cost` (counts parameters, operations, bytes). Each is imported when it is
used: some need packages that others do not.
"""
