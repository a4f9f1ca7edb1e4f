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

# remora_kernel_objects(<target> ARCHITECTURES ... | SIMULATED): the objects of every .cu file. SIMULATED leaves plain PTX
# of one target in them, which the simulator reads.
function(remora_kernel_objects target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "SIMULATED" "" "ARCHITECTURES")
  list(TRANSFORM REMORA_OPERATORS PREPEND "${CMAKE_CURRENT_SOURCE_DIR}/csrc/" OUTPUT_VARIABLE globs)
  list(TRANSFORM globs APPEND /*.cu)
  file(GLOB sources CONFIGURE_DEPENDS ${globs})
  add_library(${target} OBJECT ${sources})
  set(flags --expt-relaxed-constexpr -lineinfo -Xcompiler=-Wall,-fno-gnu-unique)
  if(arg_SIMULATED)
    set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES 80-virtual)
    list(APPEND flags --compress-mode=none)
  else()
    set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES "${arg_ARCHITECTURES}")
    set_target_properties(${target} PROPERTIES CUDA_COMPILER_LAUNCHER
                          "${Python_EXECUTABLE};${CMAKE_CURRENT_SOURCE_DIR}/cmake/record_resources.py")
    list(APPEND flags --compress-mode=size -Xptxas=-v)
  endif()
  target_compile_options(${target} PRIVATE ${flags})
endfunction()
