# Horovod 0.28.1 asks for C++14 everywhere, but the headers of current PyTorch refuse it. What CMake calls "C++14" is
# therefore spelled as the standard of the installed PyTorch, which launch/horovod/build.sh exports.
set(CMAKE_CXX14_STANDARD_COMPILE_OPTION "-std=c++$ENV{HVDVAE_CXX_STANDARD}")
set(CMAKE_CXX14_EXTENSION_COMPILE_OPTION "-std=gnu++$ENV{HVDVAE_CXX_STANDARD}")
