"""What runs inside an allocation: one engine, then its trials one after another."""
