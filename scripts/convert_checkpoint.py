"""Model weights: DCP checkpoint folder <-> one torch file or safetensors. See --help."""

from lt2titan.checkpoint.convert import main

if __name__ == "__main__":
    raise SystemExit(main())
