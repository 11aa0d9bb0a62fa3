"""Which class a task belongs to: by its nearest examples, by regression, or by a model."""
