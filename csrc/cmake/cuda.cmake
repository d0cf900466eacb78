# The module _cuda. QKERN_CUDA=AUTO builds it where there is an nvcc, ON demands one, OFF leaves it out. (tests/conftest.py
# compiles the same sources as plain C++ that runs on the CPU.)
# QKERN_CUDA_ARCHITECTURES: as CMAKE_CUDA_ARCHITECTURES. Default: those of the GPUs here, else sm_80 and sm_90a. A wheel
# for everyone takes "75-real;80-real;86-real;89-real;90-real;100-real;120".
set(QKERN_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
set_property(CACHE QKERN_CUDA PROPERTY STRINGS AUTO ON OFF)
set(QKERN_CUDA_ARCHITECTURES "" CACHE STRING "CUDA architectures; empty: the GPUs here, else 80-real;90a-real")
if(NOT QKERN_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "qkern: QKERN_CUDA is ${QKERN_CUDA}; allowed are AUTO, ON and OFF")
endif()

set(QKERN_CUDA_BUILD "left out: QKERN_CUDA=OFF")
if(NOT QKERN_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(QKERN_CUDA_BUILD "left out: no nvcc was found")
    if(QKERN_CUDA STREQUAL "ON")
      message(FATAL_ERROR "qkern: QKERN_CUDA=ON, but no nvcc was found; put it on PATH or set CUDACXX")
    endif()
  else()
    if(NOT QKERN_CUDA_ARCHITECTURES)
      execute_process(COMMAND nvidia-smi -L RESULT_VARIABLE status OUTPUT_VARIABLE found ERROR_QUIET)
      if(status STREQUAL "0" AND found MATCHES "GPU")
        set(QKERN_CUDA_ARCHITECTURES native)
      else()
        set(QKERN_CUDA_ARCHITECTURES 80-real 90a-real)
      endif()
    endif()
    set(CMAKE_CUDA_ARCHITECTURES ${QKERN_CUDA_ARCHITECTURES})
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
      message(FATAL_ERROR "qkern: nvcc ${CMAKE_CUDA_COMPILER_VERSION} is too old, 12.0 is the oldest; "
                          "set QKERN_CUDA=OFF to build without CUDA")
    endif()
    set(QKERN_CUDA_BUILD "nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
  endif()
endif()
message(STATUS "qkern: CUDA kernels: ${QKERN_CUDA_BUILD}")

if(QKERN_CUDA_BUILD MATCHES "^nvcc")
  file(GLOB QKERN_CUDA_SOURCES CONFIGURE_DEPENDS csrc/core/*.cu csrc/kernels/*/*.cu)
  file(GLOB QKERN_CUDA_BINDINGS CONFIGURE_DEPENDS csrc/bindings/cuda/*.cpp)
  pybind11_add_module(_cuda MODULE NO_EXTRAS ${QKERN_CUDA_BINDINGS} ${QKERN_CUDA_SOURCES})
  target_include_directories(_cuda PRIVATE csrc/include)
  list(JOIN CMAKE_CUDA_ARCHITECTURES " " architectures)
  set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
                                         CUDA_VISIBILITY_PRESET hidden)
  target_compile_definitions(_cuda PRIVATE QKERN_CUDA_ARCHITECTURES="${architectures}")
  # A register that spills to memory costs more than it shows: reported, and with QKERN_WERROR an error.
  target_compile_options(
    _cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -Xptxas=--warn-on-spills
                  $<$<BOOL:${QKERN_WERROR}>:-Xptxas=--warning-as-error> -Xcompiler=-Wall>
                  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>)
  # Another cudart in the process (torch's own) must not answer for this one.
  target_link_options(_cuda PRIVATE -Wl,--exclude-libs,ALL)
  target_compile_definitions(_cuda PRIVATE QKERN_VERSION="${SKBUILD_PROJECT_VERSION}")
  install(TARGETS _cuda LIBRARY DESTINATION .)
endif()
