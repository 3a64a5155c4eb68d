"""The cloud service: programs, runner, fleet, twins, LLM, distillation, registry."""
