"""What train.py is made of: the data, the run and its folder, how it starts or goes on, optimizer, schedule and log."""
