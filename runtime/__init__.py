"""The process that a script runs in, its device, and several processes that train as one."""
