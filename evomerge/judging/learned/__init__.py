"""The learned judge: a ridge regression for each task, fitted on graded answers."""
