module pagecast.example/restore

go 1.19
