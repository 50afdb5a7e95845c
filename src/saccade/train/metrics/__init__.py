"""The measures of each field, one file a field, each with its one definition and its source."""
