"""How far a judge can be trusted, measured on answers that a reference has graded."""
