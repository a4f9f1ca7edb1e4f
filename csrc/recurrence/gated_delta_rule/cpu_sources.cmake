# CPU sources and, where an instruction set other than the compiler's default is needed, the flags of each file. cpu.cpp
# runs on every processor and picks one of the others at run time.
set(REMORA_GATED_DELTA_RULE_CPU_SOURCES cpu.cpp cpu_baseline.cpp)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND REMORA_GATED_DELTA_RULE_CPU_SOURCES cpu_x86_64_v3.cpp cpu_x86_64_v4.cpp cpu_x86_64_v4_bf16.cpp)
  set(REMORA_GATED_DELTA_RULE_CPU_FLAGS_cpu_x86_64_v3.cpp -march=x86-64-v3)
  set(REMORA_GATED_DELTA_RULE_CPU_FLAGS_cpu_x86_64_v4.cpp -march=x86-64-v4 -mprefer-vector-width=512)
  set(REMORA_GATED_DELTA_RULE_CPU_FLAGS_cpu_x86_64_v4_bf16.cpp -march=x86-64-v4 -mavx512bf16 -mprefer-vector-width=512)
endif()
# Kernel files only: fused multiply-adds, vectors passed between inlined functions, and a false alarm of GCC 12's own
# AVX-512 header.
set(REMORA_GATED_DELTA_RULE_CPU_OPTIONS -O3 -ffp-contract=fast -Wno-psabi -Wno-maybe-uninitialized)
