"""What tests need of Azure: `arm_server`, which needs nothing but the standard library."""
