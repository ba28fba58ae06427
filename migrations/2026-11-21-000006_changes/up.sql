-- Numbers the changes that replicas tell each other of; see the store's changes.
CREATE SEQUENCE change_revision;
