"""llama.cpp through llama-cpp-python: text as Q4_0, pictures through its multimodal library."""
