"""The planner on vLLM: guidance as two requests that the engine keeps in step."""
