package main

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"testing"
)

//go:embed created_fork.json
var createdForkJSON []byte

func TestFirecrackerGetsTheMemoryBackendOfTheAnswer(t *testing.T) {
	var created CreatedFork
	decode(createdForkJSON, &created)
	load := loadParams(created, "/srv/browser/snapshot.vmstate")
	sent, err := json.MarshalIndent(load, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if want := bytes.TrimSpace(loadSnapshotJSON); !bytes.Equal(sent, want) {
		t.Errorf("sent %s, want %s", sent, want)
	}
}

func TestTheRequestEqualsTheExample(t *testing.T) {
	var wanted CreateFork
	decode(createForkJSON, &wanted)
	sent, err := json.MarshalIndent(wanted, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if want := bytes.TrimSpace(createForkJSON); !bytes.Equal(sent, want) {
		t.Errorf("sent %s, want %s", sent, want)
	}
}
