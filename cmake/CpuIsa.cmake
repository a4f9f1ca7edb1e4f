# CPU kernels are compiled once per instruction set, each in a file of its own, and chosen at run time by cpu.cpp.
set(REMORA_CPU_FLAGS_baseline "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(REMORA_CPU_ISAS baseline x86_64_v3 x86_64_v4 x86_64_v4_bf16)
  set(REMORA_CPU_FLAGS_x86_64_v3 -march=x86-64-v3)
  set(REMORA_CPU_FLAGS_x86_64_v4 -march=x86-64-v4 -mprefer-vector-width=512)
  set(REMORA_CPU_FLAGS_x86_64_v4_bf16 -march=x86-64-v4 -mavx512bf16 -mprefer-vector-width=512)
else()
  set(REMORA_CPU_ISAS baseline)
endif()

# remora_cpu_sources(<target> <operator folder>...): cpu.cpp and one cpu_<isa>.cpp for every instruction set.
function(remora_cpu_sources target)
  foreach(operator IN LISTS ARGN)
    target_sources(${target} PRIVATE csrc/${operator}/cpu.cpp)
    foreach(isa IN LISTS REMORA_CPU_ISAS)
      target_sources(${target} PRIVATE csrc/${operator}/cpu_${isa}.cpp)
      set_source_files_properties(csrc/${operator}/cpu_${isa}.cpp PROPERTIES COMPILE_OPTIONS
                                  "-O3;-fno-math-errno;-ffp-contract=fast;-Wno-psabi;-Wno-maybe-uninitialized;${REMORA_CPU_FLAGS_${isa}}")
    endforeach()
  endforeach()
endfunction()
