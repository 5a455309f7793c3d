// Command restore creates a fork of a template with pagecast, and loads it into a Firecracker.
//
//	restore -template browser -vmstate /srv/browser/snapshot.vmstate -firecracker /run/fc.sock
//
// The types for Firecracker have the names and the JSON of firecracker-go-sdk's client/models. A program that uses the SDK
// passes the memory backend b of pagecast's answer to it:
//
//	firecracker.WithSnapshot("", vmstate, firecracker.WithMemoryBackend(*b.BackendType, *b.BackendPath))
package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
)

// The requests, before the flags are applied. The project's tests compare these files with the API.
var (
	//go:embed create_fork.json
	createForkJSON []byte
	//go:embed load_snapshot.json
	loadSnapshotJSON []byte
)

// CreateFork is the body of pagecast's POST /v1/forks, and CreatedFork the answer.
type CreateFork struct {
	Template string `json:"template"`
	ID       string `json:"id,omitempty"`
	Backend  string `json:"backend,omitempty"`
	PID      int    `json:"pid,omitempty"`
}

type CreatedFork struct {
	ID         string         `json:"id"`
	Template   string         `json:"template"`
	Backend    string         `json:"backend"`
	Reason     string         `json:"reason"`
	MemBackend *MemoryBackend `json:"mem_backend"`
}

// MemoryBackend is models.MemoryBackend, and SnapshotLoadParams is the used part of models.SnapshotLoadParams.
type MemoryBackend struct {
	BackendPath *string `json:"backend_path"`
	BackendType *string `json:"backend_type"`
}

type SnapshotLoadParams struct {
	MemBackend   *MemoryBackend `json:"mem_backend,omitempty"`
	ResumeVM     bool           `json:"resume_vm,omitempty"`
	SnapshotPath *string        `json:"snapshot_path"`
}

func main() {
	pagecast := flag.String("pagecast", "/run/pagecast/control.sock", "the control socket of pagecast")
	firecracker := flag.String("firecracker", "", "the API socket of a Firecracker that has no microVM yet")
	template := flag.String("template", "", "the template to fork")
	backend := flag.String("backend", "auto", "auto, uffd or file")
	pid := flag.Int("pid", 0, "the process ID of the Firecracker, for the backend file")
	vmstate := flag.String("vmstate", "", "the state file of the snapshot")
	flag.Parse()
	log.SetFlags(0)

	var wanted CreateFork
	decode(createForkJSON, &wanted)
	wanted.Template, wanted.Backend, wanted.PID = *template, *backend, *pid
	var created CreatedFork
	if err := call(*pagecast, http.MethodPost, "/v1/forks", wanted, &created); err != nil {
		log.Fatal("failed to create a fork: ", err)
	}
	load := loadParams(created, *vmstate)
	if err := call(*firecracker, http.MethodPut, "/snapshot/load", load, nil); err != nil {
		log.Fatal("failed to load the snapshot: ", err)
	}
	fmt.Printf("%s runs with %s: %s\n", created.ID, created.Backend, created.Reason)
}

// loadParams returns the parameters with which Firecracker loads a fork.
func loadParams(fork CreatedFork, vmstate string) SnapshotLoadParams {
	var load SnapshotLoadParams
	decode(loadSnapshotJSON, &load)
	load.MemBackend, load.SnapshotPath = fork.MemBackend, &vmstate
	return load
}

// decode decodes JSON that is embedded in this program. It panics if a field is unknown.
func decode(data []byte, into any) {
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		panic(err)
	}
}

// call sends JSON over a unix socket, and decodes the answer into answer, unless that is nil.
func call(socket, method, path string, body, answer any) error {
	client := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}}
	data, err := json.Marshal(body)
	if err != nil {
		return err
	}
	request, err := http.NewRequest(method, "http://localhost"+path, bytes.NewReader(data))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	data, err = io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	if response.StatusCode >= 300 {
		return fmt.Errorf("%s: %s", response.Status, data)
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(data, answer)
}
