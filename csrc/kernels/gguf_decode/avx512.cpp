// gguf_decode, tier avx512: decode.h compiled with this tier's flags; the bits are the same in every tier.
#include "decode.h"

extern "C" void qk_enter_gguf_decode_avx512(qk::KernelTable* table) { table->gguf_decode = &decode; }
