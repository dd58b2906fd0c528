"""Object-centric models with Multi-Scale Fusion, trained at GPU speed."""
