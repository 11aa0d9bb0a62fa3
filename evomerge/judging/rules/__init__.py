"""The rule-based judge, offline: closed tasks are right or wrong, open ones are measured."""
