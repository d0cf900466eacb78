// pack_bits and unpack_bits, scalar tier. Layouts: README.md.
#include "kernel.h"

extern "C" void qk_enter_pack_bits_scalar(qk::KernelTable* table) {
    table->pack_bits = &pack;
    table->unpack_bits = &unpack;
}
