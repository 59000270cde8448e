"""What is compared with what; run.py measures and prints it."""

import collections

# what: the work. contenders: {name: (function, arguments)}, or (function, arguments, environment), a dict of further
# variables. rows: list of Speed and Value. rounds: measurements of each contender.
# items: how many pictures, say, a measurement works on: speeds are shown for one. same: the name of a result in which
# all contenders must agree to 1 in 1000, or None.
Comparison = collections.namedtuple("Comparison", "what contenders rows rounds items same", defaults=(5, 1, None))
# Speed: how many times as fast the contender `ours` is as `other`; should be at least `bar` (None: no aim). by:
# "seconds", or "cpu" for the processor's time in all threads: what a core can do even while another program has it.
Speed = collections.namedtuple("Speed", "ours other bar by", defaults=(None, "seconds"))
# Value: figure({contender: result}) of a round, which should be at most `bar`; `against` says in words what it is.
Value = collections.namedtuple("Value", "against figure bar unit", defaults=(None, ""))
