# build_info.h and kernel_resources.inc: what remora.info() and remora._C.kernel_table() report about the build.
set(REMORA_HAS_SIM false)
if(REMORA_SIM)
  set(REMORA_HAS_SIM true)
endif()
if(NOT REMORA_CUDA)
  set(REMORA_CUDA_ARCHITECTURES "")
endif()
list(JOIN REMORA_CUDA_ARCHITECTURES " " REMORA_ARCHITECTURE_LIST)
set(remora_generated "${CMAKE_BINARY_DIR}/generated")
configure_file(cmake/build_info.h.in "${remora_generated}/build_info.h" @ONLY)

if(REMORA_CUDA)
  add_custom_command(
    OUTPUT "${remora_generated}/kernel_resources.inc"
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/record_resources.py" --merge
            "${remora_generated}/kernel_resources.inc" $<TARGET_OBJECTS:remora_kernels>
    DEPENDS $<TARGET_OBJECTS:remora_kernels> COMMAND_EXPAND_LISTS VERBATIM)
else()
  file(WRITE "${remora_generated}/kernel_resources.inc" "")
endif()
target_sources(_C PRIVATE "${remora_generated}/kernel_resources.inc")
target_include_directories(_C PRIVATE "${remora_generated}")
