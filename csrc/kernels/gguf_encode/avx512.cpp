// gguf_encode, tier avx512: encode.h compiled with this tier's flags; the bits are the same in every tier.
#include "encode.h"

extern "C" void qk_enter_gguf_encode_avx512(qk::KernelTable* table) { table->gguf_encode = &encode; }
