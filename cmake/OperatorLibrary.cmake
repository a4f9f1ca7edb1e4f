# remora_operator_library(<target> BACKEND CPU|CUDA|SIM [SCHEMA]): the bindings of every operator for one backend. They
# use PyTorch's stable ABI and no Python symbol, so one library serves every torch >= 2.11 and every Python.
function(remora_operator_library target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "SCHEMA" "BACKEND" "")
  list(TRANSFORM REMORA_OPERATORS PREPEND csrc/ OUTPUT_VARIABLE sources)
  list(TRANSFORM sources APPEND /bind.cpp)
  if(arg_SCHEMA)
    list(APPEND sources csrc/torch/schema.cpp)
  endif()
  add_library(${target} SHARED ${sources})
  target_compile_definitions(${target} PRIVATE REMORA_BACKEND_${arg_BACKEND})
  target_link_libraries(${target} PRIVATE torch_stable)
  set_target_properties(${target} PROPERTIES LINKER_LANGUAGE CXX INSTALL_RPATH "$ORIGIN/../torch/lib"
                                             BUILD_WITH_INSTALL_RPATH ON)
  install(TARGETS ${target} LIBRARY DESTINATION remora)
endfunction()

# remora_kernel_objects(<target> <architecture>...): the objects of every .cu file. With plain PTX of compute capability
# 8.0 in them they serve the simulator too, which reads it from the objects.
set(REMORA_SIM_ARCHITECTURE 80-virtual)
function(remora_kernel_objects target)
  list(TRANSFORM REMORA_OPERATORS PREPEND "${CMAKE_CURRENT_SOURCE_DIR}/csrc/" OUTPUT_VARIABLE globs)
  list(TRANSFORM globs APPEND /*.cu)
  file(GLOB sources CONFIGURE_DEPENDS ${globs})
  add_library(${target} OBJECT ${sources})
  set(compress size)
  if(REMORA_SIM AND REMORA_SIM_ARCHITECTURE IN_LIST ARGN)
    set(compress none)
  endif()
  set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES "${ARGN}")
  target_compile_options(${target} PRIVATE --expt-relaxed-constexpr -lineinfo -Xcompiler=-Wall,-fno-gnu-unique
                                           --compress-mode=${compress})
endfunction()
