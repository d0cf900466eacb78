// pack_bits and unpack_bits, avx2 tier: the loops of kernel.h as the compiler vectorises them. Layouts: README.md.
#include "kernel.h"

extern "C" void qk_enter_pack_bits_avx2(qk::KernelTable* table) {
    table->pack_bits = &pack;
    table->unpack_bits = &unpack;
}
