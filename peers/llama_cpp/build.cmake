# Read after each project() of llama-cpp-python's build (CMAKE_PROJECT_INCLUDE): its package forces llama.cpp's `common`
# library on, a quarter of the units and the slowest, of which neither libllama nor libmtmd uses anything. A plain variable
# stands before the cached one that it sets.
set(LLAMA_BUILD_COMMON OFF)
