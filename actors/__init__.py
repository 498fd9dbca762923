"""Generation with vLLM, scored and streamed to the buffer."""
