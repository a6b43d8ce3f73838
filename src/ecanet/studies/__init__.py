"""Studies of networks: their costs, their accuracy and speed, and the behaviour of their gates.

Read downward: `publishing` (a run's network for others), `app` (a page to try a network), `gates` (the behaviour of
trained gates), `ablate` (variants with several seeds), `bench` (time and memory), `doctor` (this installation), `paper`
(the paper's tables beside what is measured), `cost` (parameters, operations and bytes), `operations` (the paper's
rules), `shapes` (runs that compute shapes alone). Each is imported only when it is used, because some need packages
that others do not.
"""
