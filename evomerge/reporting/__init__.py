"""What a study gives: report, model card, export, runner."""
