// Entry, ring changes and interrupt handlers. Everything with a stack layout of its own lives here.

.section .entry, "ax"
.global _start
// 64-bit Linux boot protocol: long mode, interrupts off, rsi = boot params.
_start:
    lea rsp, [rip + kernel_stack_top]
    mov rdi, rsi
    call start
    ud2

.text

// run_in_ring3_raw(function: rdi, argument: rsi): calls function(argument) in ring 3 with interrupts off.
// There is one way back that all hosts deliver, an exception: hosts without VT-x/SVM know no software interrupts.
.global run_in_ring3_raw
run_in_ring3_raw:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [rip + kernel_rsp], rsp
    lea rcx, [rip + user_stack_top]
    lea rdx, [rip + user_call]
    push 0x1b           // ss: user data
    push rcx            // rsp
    push 0x2            // rflags: nothing but the bit that is always set
    push 0x23           // cs: user code
    push rdx            // rip
    mov rax, rdi
    mov rdi, rsi
    iretq

user_call:
    call rax
user_return:
    ud2

.global invalid_opcode
invalid_opcode:
    push rax
    lea rax, [rip + user_return]
    cmp rax, [rsp + 8]
    pop rax
    jne exception_6
    mov rsp, [rip + kernel_rsp]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

// A received byte: nothing to do but to acknowledge. The loop that sleeps in hlt looks at the serial port itself.
.global serial_interrupt
serial_interrupt:
    push rax
    mov al, 0x20        // end of interrupt
    out 0x20, al
    pop rax
    iretq

// Sixteen bytes each, so that cpu.rs finds the handler of a vector by its number.
.balign 16
.global exceptions
exceptions:
.irp vector, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
.balign 16
exception_\vector:
    push \vector
    jmp exception
.endr

// The vector, then either the error code and rip, or rip and cs.
exception:
    mov rdi, [rsp]
    mov rsi, [rsp + 8]
    mov rdx, [rsp + 16]
    mov rcx, cr2
    and rsp, -16
    call report_exception
    ud2

.bss
.balign 16
    .skip 16384
kernel_stack_top:
    .skip 4096
.global trap_stack_top
trap_stack_top:
    .skip 16384
user_stack_top:
kernel_rsp:
    .skip 8
