"""The outputs of a study: report, model card, export, runner."""
