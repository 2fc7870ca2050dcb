"""Results as other tools write and read them: exports of trials, imports of loads."""
