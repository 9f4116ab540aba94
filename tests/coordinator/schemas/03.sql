BEGIN TRANSACTION;
CREATE TABLE admissions (
	node_id VARCHAR(16) NOT NULL, 
	invitation VARCHAR(8) NOT NULL, 
	PRIMARY KEY (node_id), 
	FOREIGN KEY(node_id) REFERENCES nodes (id), 
	FOREIGN KEY(invitation) REFERENCES invitations (id)
);
INSERT INTO "admissions" VALUES('a','00000000');
CREATE TABLE evaluations (
	id INTEGER NOT NULL, 
	experts INTEGER NOT NULL, 
	final BOOLEAN NOT NULL, 
	"row" JSON NOT NULL, 
	evaluated_at DOUBLE NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (experts, final)
);
INSERT INTO "evaluations" VALUES(1,0,0,'{"mean_perplexity": 36.0}',1000000.0);
CREATE TABLE handovers (
	id INTEGER NOT NULL, 
	slot INTEGER, 
	sha256 VARCHAR(64) NOT NULL, 
	size INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	lease_id VARCHAR(32) NOT NULL, 
	node_id VARCHAR(16) NOT NULL, 
	spoiled BOOLEAN NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (slot), 
	FOREIGN KEY(slot) REFERENCES partitions (id), 
	FOREIGN KEY(lease_id) REFERENCES leases (id), 
	FOREIGN KEY(node_id) REFERENCES nodes (id)
);
CREATE TABLE inheritances (
	lease_id VARCHAR(32) NOT NULL, 
	handover INTEGER NOT NULL, 
	PRIMARY KEY (lease_id), 
	FOREIGN KEY(lease_id) REFERENCES leases (id), 
	FOREIGN KEY(handover) REFERENCES handovers (id)
);
CREATE TABLE invitations (
	id VARCHAR(8) NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	name VARCHAR(64) NOT NULL, 
	uses INTEGER NOT NULL, 
	used INTEGER NOT NULL, 
	created_at DOUBLE NOT NULL, 
	expires_at DOUBLE NOT NULL, 
	revoked_at DOUBLE, 
	PRIMARY KEY (id)
);
INSERT INTO "invitations" VALUES('00000000','0000000000000000000000000000000000000000000000000000000000000000','',5,1,1.0,2000000.0,NULL);
CREATE TABLE leases (
	id VARCHAR(32) NOT NULL, 
	partition INTEGER NOT NULL, 
	node_id VARCHAR(16) NOT NULL, 
	granted_at DOUBLE NOT NULL, 
	expires_at DOUBLE NOT NULL, 
	ended VARCHAR(16), 
	active_node VARCHAR(16), 
	active_partition INTEGER, 
	progress JSON NOT NULL, 
	PRIMARY KEY (id), 
	FOREIGN KEY(partition) REFERENCES partitions (id), 
	FOREIGN KEY(node_id) REFERENCES nodes (id), 
	UNIQUE (active_node), 
	UNIQUE (active_partition)
);
INSERT INTO "leases" VALUES('1a9805cc8ba64a0cad4b01a0df97c5dc',0,'a',1000000.0,1000040.0,'committed',NULL,NULL,'{}');
INSERT INTO "leases" VALUES('cd65db86be764725bd91f54abbabb598',1,'b',1000000.0,1000040.0,'rejected',NULL,NULL,'{}');
INSERT INTO "leases" VALUES('59a716bc3e264f40814eceea85c84e8f',2,'c',1000000.0,1000040.0,NULL,'c',2,'{"step": 5, "steps": 10, "loss": 3.2, "tokens_per_second": 1.0, "resident_bytes": 1, "activity": "training"}');
CREATE TABLE nodes (
	id VARCHAR(16) NOT NULL, 
	public_key BLOB NOT NULL, 
	name VARCHAR(64) NOT NULL, 
	machine JSON NOT NULL, 
	joined_at DOUBLE NOT NULL, 
	seen_at DOUBLE NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "nodes" VALUES('a',X'6161616161616161616161616161616161616161616161616161616161616161','node a','{"hostname": "a"}',1000000.0,1000000.0);
INSERT INTO "nodes" VALUES('b',X'6262626262626262626262626262626262626262626262626262626262626262','node b','{"hostname": "b"}',1000000.0,1000000.0);
INSERT INTO "nodes" VALUES('c',X'6363636363636363636363636363636363636363636363636363636363636363','node c','{"hostname": "c"}',1000000.0,1000000.0);
CREATE TABLE partitions (
	id INTEGER NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	tokens INTEGER NOT NULL, 
	shared_loss DOUBLE, 
	last_rejection JSON NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "partitions" VALUES(0,'accepted',10,3.5,'[]');
INSERT INTO "partitions" VALUES(1,'open',11,3.5,'["no better"]');
INSERT INTO "partitions" VALUES(2,'leased',12,3.5,'[]');
CREATE TABLE revocations (
	node_id VARCHAR(16) NOT NULL, 
	revoked_at DOUBLE NOT NULL, 
	PRIMARY KEY (node_id), 
	FOREIGN KEY(node_id) REFERENCES nodes (id)
);
INSERT INTO "revocations" VALUES('b',1.5);
CREATE TABLE schema_version (
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
);
INSERT INTO "schema_version" VALUES(3);
CREATE TABLE shards (
	id INTEGER NOT NULL, 
	partition INTEGER NOT NULL, 
	slot INTEGER, 
	sha256 VARCHAR(64) NOT NULL, 
	size INTEGER NOT NULL, 
	lease_id VARCHAR(32) NOT NULL, 
	node_id VARCHAR(16) NOT NULL, 
	manifest BLOB NOT NULL, 
	signature BLOB NOT NULL, 
	verdict VARCHAR(16) NOT NULL, 
	judged BOOLEAN NOT NULL, 
	reasons JSON NOT NULL, 
	attempts INTEGER NOT NULL, 
	loss DOUBLE, 
	shared_loss DOUBLE, 
	received_at DOUBLE NOT NULL, 
	decided_at DOUBLE, 
	PRIMARY KEY (id), 
	UNIQUE (partition, sha256), 
	FOREIGN KEY(partition) REFERENCES partitions (id), 
	UNIQUE (slot), 
	FOREIGN KEY(lease_id) REFERENCES leases (id), 
	FOREIGN KEY(node_id) REFERENCES nodes (id)
);
INSERT INTO "shards" VALUES(1,0,0,'ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb',100,'1a9805cc8ba64a0cad4b01a0df97c5dc','a',X'7B22746F6B656E735F7365656E223A20313030307D',X'00000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000','accepted',1,'[]',0,3.0,3.5,1000000.0,1000000.0);
INSERT INTO "shards" VALUES(2,1,NULL,'3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d',100,'cd65db86be764725bd91f54abbabb598','b',X'7B22746F6B656E735F7365656E223A20313030307D',X'00000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000','rejected',1,'["no better"]',0,NULL,NULL,1000000.0,1000000.0);
CREATE INDEX ix_leases_partition ON leases (partition);
CREATE INDEX ix_leases_node_id ON leases (node_id);
CREATE INDEX ix_handovers_node_id ON handovers (node_id);
COMMIT;
