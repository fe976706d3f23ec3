"""What LEAFE is compared with, and what may go before it: a file a method, each with `train(run, round_)`."""
