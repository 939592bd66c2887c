"""Where FlashAttention has its rotary embedding: `flash_attn.layers.rotary`."""
