"""The work inside an allocation: start one engine, then measure its trials one after another."""
