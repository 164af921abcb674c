"""Plans in and out of the ecosystem: Megatron-LM, torchtitan and DeepSpeed configurations, Chakra traces."""
