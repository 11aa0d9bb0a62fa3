"""The rule-based judge, offline: closed tasks by what the answer says, open ones by measures of its
text.
"""
