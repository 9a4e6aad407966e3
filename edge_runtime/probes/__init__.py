"""One file for each thing that is measured. A board without such a sensor gets None, not an error."""
