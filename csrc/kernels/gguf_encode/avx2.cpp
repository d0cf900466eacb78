// gguf_encode, tier avx2: encode.h compiled with this tier's flags; the bits are the same in every tier.
#include "encode.h"

extern "C" void qk_enter_gguf_encode_avx2(qk::KernelTable* table) { table->gguf_encode = &encode; }
