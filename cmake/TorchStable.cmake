# Targets torch_stable and torch_stable_cuda: PyTorch's stable ABI, found without importing torch.
# find_package(Torch) is not used: it wants a classic CUDA toolkit and overrides CMAKE_CUDA_ARCHITECTURES.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
  OUTPUT_VARIABLE REMORA_TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
file(STRINGS "${REMORA_TORCH_ROOT}/version.py" REMORA_TORCH_VERSION REGEX "^__version__")
string(REGEX REPLACE ".*['\"]([^'\"]+)['\"].*" "\\1" REMORA_TORCH_VERSION "${REMORA_TORCH_VERSION}")
message(STATUS "PyTorch ${REMORA_TORCH_VERSION}: ${REMORA_TORCH_ROOT}")

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${REMORA_TORCH_ROOT}/include")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000) # 2.11
target_link_libraries(torch_stable INTERFACE "${REMORA_TORCH_ROOT}/lib/libtorch_cpu.so")

add_library(torch_stable_cuda INTERFACE)
target_compile_definitions(torch_stable_cuda INTERFACE USE_CUDA)
if(EXISTS "${REMORA_TORCH_ROOT}/lib/libtorch_cuda.so")
  set(REMORA_TORCH_CUDA "${REMORA_TORCH_ROOT}/lib/libtorch_cuda.so")
else()
  # A CPU build of torch compiles the CUDA library too: only the name of the dependency is needed.
  file(WRITE "${CMAKE_BINARY_DIR}/torch_cuda_stub.cpp" "")
  add_library(torch_cuda_stub SHARED "${CMAKE_BINARY_DIR}/torch_cuda_stub.cpp")
  set_target_properties(torch_cuda_stub PROPERTIES OUTPUT_NAME torch_cuda)
  set(REMORA_TORCH_CUDA torch_cuda_stub)
endif()
target_link_libraries(torch_stable_cuda INTERFACE -Wl,--no-as-needed ${REMORA_TORCH_CUDA} -Wl,--as-needed)
