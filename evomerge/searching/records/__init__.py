"""What a study's storage holds, typed: its facts, its trials and its verdict."""
