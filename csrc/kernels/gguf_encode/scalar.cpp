// gguf_encode, tier scalar: encode.h compiled with this tier's flags; the bits are the same in every tier.
#include "encode.h"

extern "C" void qk_enter_gguf_encode_scalar(qk::KernelTable* table) { table->gguf_encode = &encode; }
