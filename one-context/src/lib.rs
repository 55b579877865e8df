//! OpenNebula contextualization.
