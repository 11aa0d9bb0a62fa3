"""The vLLM engine: takes each candidate's weights from memory."""
