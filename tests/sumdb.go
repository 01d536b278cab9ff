// Answers with Go's own notes and trees (golang.org/x/mod/sumdb), which ours are compared with.
package main

import (
	"crypto/rand"
	"encoding/json"
	"log"
	"os"
	"strconv"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

type claim struct {
	Size, Place int64
	Proof       []tlog.Hash
	Root, Part  tlog.Hash
}

type question struct {
	Keys        []string
	Notes       []string
	Private     string
	Text        string
	Size        int64
	Inclusion   []claim
	Consistency []claim
}

type answer struct {
	Opened      []string
	Signed      string
	Private     string
	Public      string
	New         string
	Roots       []tlog.Hash
	Inclusion   [][]tlog.RecordProof
	Consistency [][]tlog.TreeProof
	Refused     int
}

type hashes []tlog.Hash

func (h hashes) ReadHashes(places []int64) ([]tlog.Hash, error) {
	found := make([]tlog.Hash, len(places))
	for i, place := range places {
		found[i] = h[place]
	}
	return found, nil
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func sign(private, text string) string {
	signer, err := note.NewSigner(private)
	must(err)
	signed, err := note.Sign(&note.Note{Text: text}, signer)
	must(err)
	return string(signed)
}

func (q *question) notes(a *answer) {
	var keys []note.Verifier
	for _, text := range q.Keys {
		key, err := note.NewVerifier(text)
		must(err)
		keys = append(keys, key)
	}
	for _, text := range q.Notes {
		opened, err := note.Open([]byte(text), note.VerifierList(keys...))
		if err != nil {
			a.Opened = append(a.Opened, "")
		} else {
			a.Opened = append(a.Opened, strconv.Itoa(len(opened.Sigs))+" "+opened.Text)
		}
	}
	a.Signed = sign(q.Private, q.Text)
	private, public, err := note.GenerateKey(rand.Reader, "example.com/go")
	must(err)
	a.Private, a.Public, a.New = private, public, sign(private, q.Text)
}

func (q *question) trees(a *answer) {
	var stored hashes
	for n := int64(0); n < q.Size; n++ {
		more, err := tlog.StoredHashes(n, []byte(strconv.FormatInt(n, 10)), stored)
		must(err)
		stored = append(stored, more...)
		root, err := tlog.TreeHash(n+1, stored)
		must(err)
		a.Roots = append(a.Roots, root)
		var inclusion []tlog.RecordProof
		var consistency []tlog.TreeProof
		for place := int64(0); place <= n; place++ {
			record, err := tlog.ProveRecord(n+1, place, stored)
			must(err)
			tree, err := tlog.ProveTree(n+1, place+1, stored)
			must(err)
			inclusion, consistency = append(inclusion, record), append(consistency, tree)
		}
		a.Inclusion = append(a.Inclusion, inclusion)
		a.Consistency = append(a.Consistency, consistency)
	}
	for _, c := range q.Inclusion {
		if tlog.CheckRecord(c.Proof, c.Size, c.Root, c.Place, c.Part) != nil {
			a.Refused++
		}
	}
	for _, c := range q.Consistency {
		if tlog.CheckTree(c.Proof, c.Size, c.Root, c.Place, c.Part) != nil {
			a.Refused++
		}
	}
}

func main() {
	var q question
	var a answer
	must(json.NewDecoder(os.Stdin).Decode(&q))
	q.notes(&a)
	q.trees(&a)
	must(json.NewEncoder(os.Stdout).Encode(&a))
}
