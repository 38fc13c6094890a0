# Handed to CMake as CMAKE_TOOLCHAIN_FILE: the one hook that reaches Horovod's project() without editing its sources.
set(CMAKE_PROJECT_INCLUDE "${CMAKE_CURRENT_LIST_DIR}/standard.cmake")
